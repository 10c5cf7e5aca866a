"""download.sh against a small server on 127.0.0.1, whole and with everything that goes wrong on the way."""

import io
import os
import random
import re
import shutil
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "download.sh"
pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("bash", "curl", "python3"))), reason="needs bash, curl, python3")

ANNOTATIONS, VAL, TRAIN = "/annotations/annotations_trainval2017.zip", "/zips/val2017.zip", "/zips/train2017.zip"
NOISE = random.Random(0).randbytes(200_000)  # does not compress, so half of the zip is half of the picture
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


class Handler(BaseHTTPRequestHandler):
    """Files with Range, as COCO's server has them; server.cuts paths break off in the middle, once."""

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        data = self.server.files.get(self.path)
        if data is None:
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.ranges else 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "9")
            self.end_headers()
            return self.wfile.write(b"<no more>")  # must not end up in the file
        body = data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path in self.server.cuts:
            self.server.cuts.remove(self.path)
            body = body[:len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {path: make_zip(members) for path, members in FILES.items()}
    server.requests, server.cuts, server.ranges = [], set(), True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def download(server, tmp_path):
    """Runs download.sh to tmp_path/coco, with the server in place of COCO's."""
    def run(*arguments, **environment):
        kept = {name: value for name, value in os.environ.items()
                if not name.lower().endswith("_proxy") and name not in ("CACHE_URL", "COCO_URL")}
        kept |= {"HOME": str(tmp_path), "COCO_URL": f"http://127.0.0.1:{server.server_port}"}  # HOME: no .curlrc
        return subprocess.run([SCRIPT, *arguments], env=kept | environment, cwd=tmp_path, capture_output=True, text=True,
                              timeout=60)
    return run


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_refusal(result, code=1):
    """One sentence of the script's own, and the exit code."""
    lines = [line for line in result.stderr.splitlines() if "download.sh: " in line]
    return result.returncode == code and len(lines) == 1 and "Traceback" not in result.stderr


def test_all_parts_then_nothing_to_do(download, server, tmp_path):
    result = download()
    assert result.returncode == 0, result.stderr
    whole = {name: data for members in FILES.values() for name, data in members.items()}
    assert tree(tmp_path / "coco") == whole  # no zip, no part, nothing else
    assert {path.name for path in (tmp_path / "coco").iterdir()} == {"annotations", "val2017", "train2017"}
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


@pytest.mark.parametrize("share", [0.5, 1])  # all of it: the server answers 416
def test_goes_on_behind_the_part(download, server, tmp_path, share):
    data = server.files[VAL]
    there = int(len(data) * share)
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/val2017.zip.part").write_bytes(data[:there])
    result = download("--parts", "val")
    assert result.returncode == 0, result.stderr
    assert server.requests == [(VAL, f"bytes={there}-")]
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
    flipped[len(good) // 2] ^= 255  # the list of members stays readable: only the checksum tells
    server.files[VAL] = {"flipped byte": bytes(flipped), "short": good[:-50], "web page": b"<html>sorry</html>"}[damage]
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
    assert server.requests == [] and tree(tmp_path / "coco") == {"annotations/captions_val2017.json": b"mine"}


def test_missing_file_is_one_sentence(download, server):
    del server.files[VAL]
    result = download("--parts", "val")
    assert is_refusal(result) and VAL in result.stderr and "404" in result.stderr


def test_cache(download, server, tmp_path):
    array = b"\x93NUMPY" + NOISE
    server.files |= {"/c/postcache.txt": b"a dog\na cat\n", "/c/postcache.npy": array}
    server.cuts.add("/c/postcache.npy")
    address = f"http://127.0.0.1:{server.server_port}/c"
    result = download("--parts", "", "--cache", CACHE_URL=address)
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "coco") == {"postcache.txt": b"a dog\na cat\n", "postcache.npy": array}
    assert len(server.requests) == 3  # one more for the cut

    result = download("--parts", "", "--cache", CACHE_URL=address)
    assert result.returncode == 0 and result.stdout.count("nothing to do") == 2 and len(server.requests) == 3

    (tmp_path / "coco/postcache.npy").unlink()
    server.files["/c/postcache.npy"] = b"<html>sorry</html>"
    assert is_refusal(download("--parts", "", "--cache", CACHE_URL=address))
    assert not (tmp_path / "coco/postcache.npy").exists()


@pytest.mark.parametrize("arguments, word", [
    (["--speed", "9"], "--speed"), (["val"], "val"), (["--parts", "test"], "test"), (["--datadir"], "--datadir"),
    (["--datadir", "--cache"], "--datadir"), (["--cache"], "CACHE_URL"),
])
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
    assert result.stdout.startswith("Downloads COCO 2017") and result.stdout.rstrip().endswith("images.cocodataset.org).")
    assert "set -euo" not in result.stdout
