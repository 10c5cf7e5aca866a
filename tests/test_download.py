"""download.sh with a small server on 127.0.0.1: whole downloads, and all that can go wrong."""

import hashlib
import io
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from published import NAMES, serving

SCRIPT = Path(__file__).resolve().parents[1] / "download.sh"
pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("bash", "curl", "python3"))),
                                reason="needs bash, curl, python3")

ANNOTATIONS = "/annotations/annotations_trainval2017.zip"
VAL, TRAIN = "/zips/val2017.zip", "/zips/train2017.zip"
# Noise does not compress, so half of the zip is half of the picture.
NOISE = random.Random(0).randbytes(200_000)
FILES = {
    ANNOTATIONS: {f"annotations/{kind}_{split}2017.json": f'{{"of": "{split}"}}'.encode()
                  for kind in ("captions", "instances") for split in ("train", "val")},
    VAL: {"val2017/000000000001.jpg": NOISE, "val2017/000000000002.jpg": b"two"},
    TRAIN: {"train2017/000000000003.jpg": NOISE[::-1]},
}


def make_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def server():
    with serving({path: make_zip(members) for path, members in FILES.items()}) as server:
        yield server


@pytest.fixture
def download(server, tmp_path):
    """download(arguments..., NAME=value, ...) runs download.sh in tmp_path, with COCO_URL set.

    The named arguments are environment variables.
    """
    common = {name: value for name, value in os.environ.items()
              if not name.lower().endswith("_proxy") and name not in ("CACHE_URL", "COCO_URL")}
    common |= {"HOME": str(tmp_path), "COCO_URL": server.address}  # HOME: no .curlrc

    def run(*arguments, preexec_fn=None, **environment):
        return subprocess.run([SCRIPT, *arguments], env=common | environment, cwd=tmp_path,
                              capture_output=True, text=True, timeout=60, preexec_fn=preexec_fn)
    run.environment = common
    return run


def tree(folder):
    """{relative path: bytes} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def is_refusal(result, code=1):
    """Whether a run ended with this exit code and one sentence of the script's own."""
    lines = [line for line in result.stderr.splitlines() if "download.sh: " in line]
    return result.returncode == code and len(lines) == 1 and "Traceback" not in result.stderr


def test_all_parts_then_nothing_to_do(download, server, tmp_path):
    result = download()
    assert result.returncode == 0, result.stderr
    whole = {name: data for members in FILES.values() for name, data in members.items()}
    assert tree(tmp_path / "coco") == whole  # no zip and no part
    folders = {path.name for path in (tmp_path / "coco").iterdir()}
    assert folders == {"annotations", "val2017", "train2017"}
    assert server.requests == [(ANNOTATIONS, None), (VAL, None), (TRAIN, None)]

    server.requests.clear()
    result = download()
    assert result.returncode == 0, result.stderr
    assert server.requests == []
    assert result.stdout.count("nothing to do") == 3
    assert tree(tmp_path / "coco") == whole


def test_chosen_parts_in_a_folder_with_a_space(download, server, tmp_path):
    assert download("--datadir", "my data/coco [1]", "--parts", "val").returncode == 0
    assert tree(tmp_path / "my data/coco [1]") == FILES[VAL]
    assert download("--datadir", "my data/coco [1]", "--parts", "val").returncode == 0
    assert server.requests == [(VAL, None)]


@pytest.mark.parametrize("share", [0.5, 1])  # 1: the part is whole, and the server answers 416
def test_goes_on_behind_the_part(download, server, tmp_path, share):
    data = server.files[VAL]
    size = int(len(data) * share)
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/val2017.zip.part").write_bytes(data[:size])
    result = download("--parts", "val")
    assert result.returncode == 0, result.stderr
    assert server.requests == [(VAL, f"bytes={size}-")]
    assert tree(tmp_path / "coco") == FILES[VAL]


def test_goes_on_after_a_cut(download, server, tmp_path):
    server.cuts.add(VAL)
    result = download("--parts", "val")
    assert result.returncode == 0, result.stderr
    assert server.requests == [(VAL, None), (VAL, f"bytes={len(server.files[VAL]) // 2}-")]
    assert tree(tmp_path / "coco") == FILES[VAL]


def test_starts_again_where_the_server_has_no_range(download, server, tmp_path):
    server.ranges = False
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/val2017.zip.part").write_bytes(server.files[VAL][:1000])
    result = download("--parts", "val")
    assert result.returncode == 0, result.stderr
    assert server.requests == [(VAL, "bytes=1000-"), (VAL, None)]
    assert tree(tmp_path / "coco") == FILES[VAL]


@pytest.mark.parametrize("damage", ["flipped byte", "short", "web page"])
def test_damaged_zip_is_refused_then_replaced(download, server, tmp_path, damage):
    good = server.files[VAL]
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255  # the list of members stays readable: only a checksum is wrong
    server.files[VAL] = {"flipped byte": bytes(flipped), "short": good[:-50],
                         "web page": b"<html>sorry</html>"}[damage]
    result = download("--parts", "val")
    assert is_refusal(result), result.stderr
    assert "val2017.zip is damaged" in result.stderr
    assert list((tmp_path / "coco").iterdir()) == []

    server.files[VAL] = good
    assert download("--parts", "val").returncode == 0
    assert tree(tmp_path / "coco") == FILES[VAL]


@pytest.mark.parametrize("name", ["../evil", "val2017/../../evil", "{tmp}/evil", "..\\evil"])
def test_member_outside_is_refused(download, server, tmp_path, name):
    server.files[VAL] = make_zip(FILES[VAL] | {name.format(tmp=tmp_path): b"evil"})
    result = download("--parts", "val")
    assert is_refusal(result), result.stderr
    assert "val2017.zip has a member that points outside" in result.stderr
    assert tree(tmp_path) == {} and list((tmp_path / "coco").iterdir()) == []


def test_zip_of_something_else_is_refused(download, server, tmp_path):
    server.files[ANNOTATIONS] = make_zip({"annotations/captions_val2017.json": b"{}"})
    result = download("--parts", "annotations")
    assert is_refusal(result) and "annotations_trainval2017.zip does not hold" in result.stderr
    assert list((tmp_path / "coco").iterdir()) == []


def test_remains_of_a_killed_run(download, server, tmp_path):
    (tmp_path / "coco/val2017.unpacking/val2017").mkdir(parents=True)
    (tmp_path / "coco/val2017.unpacking/val2017/half.jpg").write_bytes(b"half")
    (tmp_path / "coco/val2017.zip").write_bytes(server.files[VAL])
    assert download("--parts", "val").returncode == 0
    assert server.requests == []  # the zip was whole
    assert tree(tmp_path / "coco") == FILES[VAL]


def test_somebody_elses_folder_is_left_alone(download, server, tmp_path):
    mine = tmp_path / "coco/annotations/captions_val2017.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    result = download()
    assert is_refusal(result) and "move it away" in result.stderr
    assert server.requests == []
    assert tree(tmp_path / "coco") == {"annotations/captions_val2017.json": b"mine"}


def test_missing_file_is_one_sentence(download, server):
    del server.files[VAL]
    result = download("--parts", "val")
    assert is_refusal(result) and VAL in result.stderr and "404" in result.stderr


def test_cache(download, server, tmp_path):
    array = npy(2, 5000)
    server.files |= {"/c/postcache.txt": b"a dog\na cat\n", "/c/postcache.npy": array}
    server.cuts.add("/c/postcache.npy")
    address = f"http://127.0.0.1:{server.server_port}/c"
    result = download("--parts", "", "--cache", CACHE_URL=address)
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "coco") == {"postcache.txt": b"a dog\na cat\n", "postcache.npy": array}
    assert len(server.requests) == 3  # one more for the cut

    result = download("--parts", "", "--cache", CACHE_URL=address)
    assert result.returncode == 0 and result.stdout.count("nothing to do") == 2
    assert len(server.requests) == 3

    (tmp_path / "coco/postcache.npy").unlink()
    server.files["/c/postcache.npy"] = b"<html>sorry</html>"
    assert is_refusal(download("--parts", "", "--cache", CACHE_URL=address))
    assert not (tmp_path / "coco/postcache.npy").exists()


# ----------------------------------------------------------------------------- the original's files

def npy(rows, dim, dtype=np.float32):
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(0).standard_normal((rows, dim)).astype(dtype))
    return buffer.getvalue()


def checkpoint(compression=zipfile.ZIP_STORED, pickled="archive/data.pkl"):
    """A zip in torch.save's layout. Its pickle is not one, so that loading it fails."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(pickled, b"no pickle")
        archive.writestr("archive/data/0", NOISE)
    return buffer.getvalue()


WHOLE = {"cache.txt": b"a dog\nGeoff Hinton\nfrisbee\n", "cache.npy": npy(3, 512),
         "checkpoint.ckpt": checkpoint()}
TEXT, ARRAY, CHECKPOINT = (f"/a b/{name}" for name in NAMES.values())
ALTERNATIVES = ("CACHE_URL", "README.md", "./demo.sh")  # which a refusal names


@pytest.fixture
def original(download, server):
    """original(arguments..., NAME=value, ...) runs download.sh --original, with CACHE_URL set."""
    server.files |= {f"/a b/{NAMES[file]}": data for file, data in WHOLE.items()}

    def run(*arguments, **options):
        options = {"CACHE_URL": f"{server.address}/a%20b/"} | options
        return download("--original", *arguments, **options)
    return run


def gets(server):
    return [path for path, _ in server.requests]


def have_original(folder):
    """Whether original/ holds the three files, a note with their sizes and sums, and no more."""
    files = tree(folder / "original")
    note = files.pop("SOURCE.txt").decode()
    for file, data in files.items():
        line, = (line for line in note.splitlines() if line.startswith(f"{file}: "))
        assert f"/{NAMES[file]}, {len(data)} bytes, " in line
        assert hashlib.sha256(data).hexdigest() in line
        assert re.search(r"downloaded \d{4}-\d\d-\d\d,", line)
    return files == WHOLE and len(note.splitlines()) == 3


def is_original_refusal(result, *words):
    """Whether a run was refused with one sentence that holds these words."""
    assert is_refusal(result), result.stderr
    line, = (line for line in result.stderr.splitlines() if "download.sh: " in line)
    assert all(word in line for word in words), line
    return True


def test_the_originals_files_alone_and_then_nothing_to_do(original, server, tmp_path):
    result = original()
    assert result.returncode == 0, result.stderr
    assert have_original(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]  # no coco/
    assert server.requests == [(TEXT, None), (ARRAY, None), (CHECKPOINT, None)]
    assert server.agents == {"eye02"}
    assert gets(server) == [path for path, _ in server.heads]
    size = sum(map(len, WHOLE.values())) / 1e6
    line = result.stdout.splitlines()[0]
    assert f"({size:.1f} MB) from {server.address}/a%20b to {tmp_path}/original/" in line

    before = tree(tmp_path)
    server.requests.clear(), server.heads.clear()
    result = original()
    assert result.returncode == 0 and result.stdout.count("nothing to do") == 3
    assert "Downloading" not in result.stdout and "ready" not in result.stdout
    assert server.requests == server.heads == [] and tree(tmp_path) == before


def test_the_originals_files_beside_a_part_of_coco(original, tmp_path):
    assert original("--parts", "val").returncode == 0
    assert have_original(tmp_path) and tree(tmp_path / "coco") == FILES[VAL]


@pytest.mark.parametrize("file, path", [("cache.npy", ARRAY), ("checkpoint.ckpt", CHECKPOINT)])
def test_an_originals_file_goes_on_after_a_cut(original, server, tmp_path, file, path):
    server.cuts.add(path)
    result = original()
    assert result.returncode == 0, result.stderr
    ranges = [wanted for requested, wanted in server.requests if requested == path]
    assert ranges == [None, f"bytes={len(WHOLE[file]) // 2}-"]
    assert have_original(tmp_path)


@pytest.mark.slow
def test_a_connection_that_stands_still_is_made_anew(original, server, tmp_path):
    """curl waits for one second here, where the script asks for sixty."""
    shim = tmp_path / "bin" / "curl"
    shim.parent.mkdir()
    shim.write_text(f"""#!/usr/bin/env bash
exec {shutil.which("curl")} "${{@/#60/1}}"
""")
    shim.chmod(0o755)
    server.stalls.add(CHECKPOINT)
    result = original(PATH=f"{shim.parent}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    assert gets(server).count(CHECKPOINT) == 2 and have_original(tmp_path)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.slow
def test_a_stopped_download_goes_on(original, server, download, tmp_path, sent):
    server.stalls.add(CHECKPOINT)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = download.environment | {"CACHE_URL": f"{server.address}/a%20b"}
    process = subprocess.Popen([SCRIPT, "--original"], cwd=tmp_path, env=environment, **quiet,
                               start_new_session=True)
    assert server.stalled.wait(30)
    part = tmp_path / "original" / "checkpoint.ckpt.download.part"
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, sent)
    assert process.wait(30) != 0
    size = part.stat().st_size  # the bytes that curl has written of the half that came
    assert not (tmp_path / "original" / "checkpoint.ckpt").exists()
    assert (tmp_path / "original" / "cache.npy").read_bytes() == WHOLE["cache.npy"]
    server.requests.clear()
    assert original().returncode == 0 and have_original(tmp_path)
    assert server.requests == [(CHECKPOINT, f"bytes={size}-")]


@pytest.mark.parametrize("moved", range(3))
def test_a_run_that_was_killed_among_its_last_moves_is_finished(original, server, tmp_path, moved):
    folder = tmp_path / "original"
    folder.mkdir()
    for i, (file, data) in enumerate(WHOLE.items()):
        (folder / (file if i < moved else f"{file}.download")).write_bytes(data)
    assert original().returncode == 0 and server.requests == []
    assert {file: data for file, data in tree(folder).items() if file != "SOURCE.txt"} == WHOLE


@pytest.mark.parametrize("path", [TEXT, ARRAY, CHECKPOINT])
@pytest.mark.parametrize("status", [404, 403, 503])
@pytest.mark.slow
def test_a_file_that_is_gone_is_one_sentence(original, server, tmp_path, path, status):
    if status == 404:
        del server.files[path]
    else:
        server.answers[path] = status
    assert is_original_refusal(original(), str(status), Path(path).name, *ALTERNATIVES)
    assert server.requests == [] and tree(tmp_path) == {}  # refused before the first download


@pytest.mark.parametrize("path", [TEXT, ARRAY, CHECKPOINT])
def test_a_web_page_in_place_of_an_originals_file_is_refused(original, server, tmp_path, path):
    server.files[path] = b"<!DOCTYPE html><html>moved</html>"
    server.kinds[path] = "text/html; charset=utf-8"
    assert is_original_refusal(original(), "web page", Path(path).name, *ALTERNATIVES)
    assert server.requests == []
    del server.kinds[path]  # a server that does not say so
    assert is_original_refusal(original(), Path(path).name, "deleted")
    file, = (file for file, published in NAMES.items() if published == Path(path).name)
    assert not [name for name in tree(tmp_path / "original") if name.startswith(file)]


@pytest.mark.parametrize("address, reason", [
    ("http://127.0.0.1:{port}", "refuses the connection"),
    (f"http://{70 * 'a'}.invalid/a", "is unknown")])  # too long for a host name: no DNS query
@pytest.mark.slow
def test_a_host_that_is_gone_is_one_sentence(original, tmp_path, address, reason):
    with socket.socket() as unused:  # a bound port on which no process listens
        unused.bind(("127.0.0.1", 0))
        address = address.format(port=unused.getsockname()[1])
        result = original(CACHE_URL=address)
    assert is_original_refusal(result, address, reason, *ALTERNATIVES) and tree(tmp_path) == {}


def test_a_server_without_head_serves_as_well(original, server, tmp_path, monkeypatch):
    monkeypatch.setattr("published.Handler.do_HEAD", lambda handler: handler.send_error(501))
    result = original()
    assert result.returncode == 0 and "does not say" in result.stdout and have_original(tmp_path)
    shutil.rmtree(tmp_path / "original")
    del server.files[CHECKPOINT]
    assert is_original_refusal(original(), "404", *ALTERNATIVES)


def big_header(rows):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, 512), }}"
    return b"\x93NUMPY\1\0" + (118).to_bytes(2, "little") + header.ljust(117).encode() + b"\n"


ZIP = WHOLE["checkpoint.ckpt"]
HEADER = "size that its header says"
DAMAGES = {  # {damage: (file, its damaged bytes, words of the refusal)}
    "array with a row less": ("cache.npy", npy(2, 512), "2 rows, but postcache.txt has 3 lines"),
    "array cut short": ("cache.npy", WHOLE["cache.npy"][:-1], HEADER),
    "array with more behind it": ("cache.npy", WHOLE["cache.npy"] + b"\0", HEADER),
    "array of whole numbers": ("cache.npy", npy(3, 512, np.int64), "real numbers"),
    "array of half the numbers": ("cache.npy", npy(3, 0), "real numbers"),
    "one column": ("cache.npy", npy(3, 512).replace(b"(3, 512)", b"(1536,) "), "real numbers"),
    "a header of terabytes": ("cache.npy", big_header(10 ** 12), HEADER),
    "no header": ("cache.npy", b"\x93NUMPY\1\0\xff\xff" + b"(" * 9999, "real numbers"),
    "no array": ("cache.npy", NOISE, "not a NumPy array"),
    "text with a line more":
        ("cache.txt", WHOLE["cache.txt"] + b"x", "3 rows, but postcache.txt has 4 lines"),
    "empty text": ("cache.txt", b"", "0 lines"),
    "no text": ("cache.txt", b"\xff\n\n\n", "not UTF-8"),
    "checkpoint cut short": ("checkpoint.ckpt", ZIP[:ZIP.index(b"PK\1\2") + 20], "damaged"),
    "checkpoint with other bytes":
        ("checkpoint.ckpt", ZIP[:9999] + b"\0\1\2\3" + ZIP[10003:], "damaged"),
    "zip of something else": ("checkpoint.ckpt", checkpoint(pickled="archive/a.txt"), "data.pkl"),
    "compressed zip": ("checkpoint.ckpt", checkpoint(zipfile.ZIP_DEFLATED), "compressed"),
    "no zip": ("checkpoint.ckpt", NOISE, "damaged, or not a PyTorch checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.slow
def test_a_damaged_original_is_refused_then_replaced(original, server, tmp_path, damage):
    file, data, words = DAMAGES[damage]
    server.files[f"/a b/{NAMES[file]}"] = data
    assert is_original_refusal(original(), words, "deleted")
    left = tree(tmp_path / "original")
    assert not [name for name in left if name.startswith(file)]
    if file == "checkpoint.ckpt":
        assert left.keys() == {"cache.txt", "cache.npy", "SOURCE.txt"}
    server.files[f"/a b/{NAMES[file]}"] = WHOLE[file]
    result = original()
    assert result.returncode == 0, result.stderr
    assert have_original(tmp_path)


def test_more_bytes_than_the_server_names_are_refused(original, server, tmp_path):
    """The .part file is longer than the file on the server."""
    (tmp_path / "original").mkdir()
    (tmp_path / "original/cache.npy.download.part").write_bytes(WHOLE["cache.npy"] + b"more")
    size = len(WHOLE["cache.npy"])
    assert is_original_refusal(original(), f"{size + 4} bytes instead of {size}", "deleted")
    assert original().returncode == 0 and have_original(tmp_path)


def test_files_of_ones_own_in_original_stay(original, server, tmp_path):
    mine = tmp_path / "original" / "cache.txt"
    mine.parent.mkdir()
    mine.write_bytes(b"mine\n")
    assert is_original_refusal(original(), "3 rows, but postcache.txt has 1 lines")
    assert tree(tmp_path) == {"original/cache.txt": b"mine\n"}


@pytest.mark.slow
def test_a_missing_file_of_three_is_fetched_alone(original, server, tmp_path):
    assert original().returncode == 0
    for file, path in zip(WHOLE, (TEXT, ARRAY, CHECKPOINT)):
        (tmp_path / "original" / file).unlink()
        server.requests.clear()
        assert original().returncode == 0 and gets(server) == [path] and have_original(tmp_path)


def test_where_there_is_no_room_nothing_is_downloaded(original, server, tmp_path):
    stub = tmp_path / "bin" / "df"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho Filesystem Blocks Used Available\necho disk 200 100 100\n")
    stub.chmod(0o755)
    result = original(PATH=f"{stub.parent}:{os.environ['PATH']}")
    assert is_original_refusal(result, "0.1 MB free", "make room") and server.requests == []
    part = tmp_path / "original/checkpoint.ckpt.download.part"
    part.write_bytes(ZIP[:-1000])  # the rest fits
    assert original(PATH=f"{stub.parent}:{os.environ['PATH']}").returncode == 0
    assert have_original(tmp_path)


def test_a_disk_that_fills_up_is_named_and_the_download_goes_on(original, server, tmp_path):
    def limit_files():  # a longer file is an error, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    result = original(preexec_fn=limit_files)
    assert is_original_refusal(result, "checkpoint.ckpt.download.part", "make room")
    server.requests.clear()
    assert original().returncode == 0 and have_original(tmp_path)
    assert len(server.requests) == 1 and server.requests[0][1].startswith("bytes=")


def test_a_file_in_the_place_of_the_originals_folder(original, server, tmp_path):
    (tmp_path / "original").write_text("")
    assert is_original_refusal(original(), "cannot write to the folder original")
    assert server.requests == []


# -------------------------------------------------------------------------------------------- usage

@pytest.mark.parametrize("arguments, word", [
    (["--speed", "9"], "--speed"), (["val"], "val"), (["--parts", "test"], "test"),
    (["--datadir"], "--datadir"), (["--datadir", "--cache"], "--datadir"),
    (["--cache"], "CACHE_URL")])
def test_wrong_usage_exits_2(download, server, tmp_path, arguments, word):
    result = download(*arguments)
    assert is_refusal(result, code=2) and word in result.stderr
    assert server.requests == [] and not (tmp_path / "coco").exists()


def test_folder_that_cannot_be_written(download, server, tmp_path):
    (tmp_path / "file").write_text("")  # root may write to any folder, but not below a file
    result = download("--datadir", "file/coco")
    assert is_refusal(result) and "file/coco" in result.stderr and server.requests == []


def test_help_is_the_head_comment(download):
    result = download("--help")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith("Downloads COCO 2017")
    assert result.stdout.rstrip().endswith("images.cocodataset.org).")
    assert "set -euo" not in result.stdout
