"""Sealed lines: what was written whole comes back, and nothing else does."""

import errno
import hashlib
import json
import os
import random

import pytest

from antarctic.errors import InputError
from antarctic.files import append
from antarctic.sealed import resume, seal, unseal

RECORDS = [["a story", "another"], {"image_id": 7, "table": [["dog", 0.31]]}, "", 0, [], False,
           "naïve café 猫 🐈", "line\nbreak \u2028 \x00 \x1b", "half a character \ud800 \udcff",
           -1.5e-300, {"a": {"b": [None]}}]


@pytest.mark.parametrize("record", RECORDS, ids=ascii)
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

def always(number, record):
    return True


@pytest.fixture
def part(tmp_path):
    """A part file of three records."""
    path = tmp_path / "run.part"
    append(path, b"".join(map(seal, "abc")))
    return path


def test_a_run_without_a_part_file_begins_anew(tmp_path):
    assert resume(tmp_path / "none.part", always) == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("behind", [
    b"", b"half a line", seal("d")[:-1], seal("d")[:-2] + b"\n", bytes(500), b"\xff\xfe\n",
    seal("d").replace(b"d", b"e") + seal("e"), b"[" * 100_000, b'"d"\n'], ids=len)
def test_records_are_kept_up_to_the_first_line_that_is_not_whole(part, behind):
    whole = part.read_bytes()
    part.write_bytes(whole + behind)
    assert resume(part, always) == ["a", "b", "c"] and part.read_bytes() == whole
    append(part, seal("d"))
    assert resume(part, always) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("length", range(0, len(seal("a")) * 3 + 1, 5))
def test_a_file_that_was_cut_anywhere_keeps_its_whole_lines(part, length):
    os.truncate(part, length)
    size = len(seal("a"))
    assert resume(part, always) == list("abc")[:length // size]
    assert part.stat().st_size == length // size * size


def test_a_record_that_does_not_fit_ends_what_is_kept(part):
    asked = []

    def fits(number, record):
        asked.append((number, record))
        return record != "b"

    assert resume(part, fits) == ["a"] and asked == [(0, "a"), (1, "b")]
    assert part.read_bytes() == seal("a")


def test_a_file_that_cannot_be_written_is_named(part, monkeypatch):
    def read_only(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(InputError, match=f"cannot write {part}"):
        resume(part, always)
