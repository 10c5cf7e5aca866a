"""Sealed lines: what was written whole comes back, and nothing else does."""

import errno
import hashlib
import json
import os
import random

import pytest

from antarctic.errors import InputError
from antarctic.files import append
from antarctic.sealed import read_sealed, resume, seal, unseal

VALUES = [["a story", "another"], {"image_id": 7, "table": [["dog", 0.31]]}, "", 0, [], False,
           "naïve café 猫 🐈", "line\nbreak \u2028 \x00 \x1b", "half a character \ud800 \udcff",
           -1.5e-300, {"a": {"b": [None]}}]


@pytest.mark.parametrize("record", VALUES, ids=ascii)
def test_a_sealed_record_comes_back(record):
    line = seal(record)
    assert unseal(line) == record
    assert line.endswith(b"\n") and line.count(b"\n") == 1


def test_a_line_is_a_digest_and_readable_json():
    line = seal({"caption": "ein Bär"})
    text = '{"caption": "ein Bär"}'.encode()
    assert line == hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"
    json.loads(seal("\ud800").split(b" ", 1)[1].decode())  # valid UTF-8


def test_no_changed_byte_goes_unnoticed():
    line, rng = seal(["a red dog", "a whale"]), random.Random(0)
    for place in range(len(line)):
        assert unseal(line[:place]) is None
        changed = bytearray(line)
        changed[place] ^= rng.randrange(1, 256)
        assert unseal(bytes(changed)) is None
    for altered in (line + b"x", line + b"\n", b" " + line):
        assert unseal(altered) is None


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_what_is_sealed_but_no_json_is_refused(text):
    assert unseal(hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n") is None


@pytest.mark.parametrize("line", [
    b"", b"\n", b" \n", b"\0" * 100, b'["a"]\n', b"0" * 16 + b' ["a"]\n'])
def test_what_was_never_sealed_is_refused(line):
    assert unseal(line) is None


# ----------------------------------------------------------------------------------------- resuming

RECORDS = [{"image_id": i, "caption": "ä dog\n\u2028" * i, "score": 0.1 * i, "file": "\udcff.png"}
           for i in range(7)]
LINES = [seal(record) for record in RECORDS]


def test_a_file_is_resumed_at_every_length(tmp_path):
    path, whole = tmp_path / "part", b"".join(LINES)
    ends = [len(b"".join(LINES[:n])) for n in range(len(LINES) + 1)]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        lines = resume(path)
        assert lines == max(n for n, end in enumerate(ends) if end <= size)
        assert path.read_bytes() == whole[:ends[lines]] and list(
            read_sealed(path)) == RECORDS[:lines]


def test_a_file_that_is_missing_has_no_lines_and_is_not_made(tmp_path):
    assert resume(tmp_path / "part") == 0 and not list(tmp_path.iterdir())


def test_bytes_that_no_run_wrote_are_no_records(tmp_path):
    rng, path = random.Random(0), tmp_path / "part"
    for _ in range(200):
        path.write_bytes(LINES[0] + rng.randbytes(rng.randrange(99)) + b"".join(LINES[1:]))
        resume(path)
        kept = list(read_sealed(path))
        assert kept == RECORDS[:len(kept)] and kept


@pytest.mark.parametrize("behind", [
    b"", b"half a line", seal("d")[:-1], seal("d")[:-2] + b"\n", bytes(500), b"\xff\xfe\n",
    seal("d").replace(b"d", b"e") + seal("e"), b"[" * 100_000, b'"d"\n'], ids=len)
def test_records_are_kept_up_to_the_first_line_that_is_not_whole(tmp_path, behind):
    part = tmp_path / "part"
    part.write_bytes(b"".join(LINES) + behind)
    assert resume(part) == 7 and part.read_bytes() == b"".join(LINES)
    append(part, seal("d"))
    assert resume(part) == 8 and list(read_sealed(part)) == [*RECORDS, "d"]


def test_a_line_without_an_end_is_cut_off(tmp_path):
    part = tmp_path / "part"
    part.write_bytes(b"".join(LINES))
    os.truncate(part, 1 << 40)  # sparse
    assert list(read_sealed(part)) == RECORDS
    assert resume(part) == 7 and part.read_bytes() == b"".join(LINES)


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def read_only(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    (tmp_path / "part").touch()
    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(InputError, match="cannot write .*part"):
        resume(tmp_path / "part")
