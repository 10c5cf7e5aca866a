"""Sealed lines: what is whole comes back, and nothing else."""

import json
import random

import pytest

from antarctic.errors import InputError
from antarctic.sealed import read_sealed, resume, seal, unseal

RECORDS = [{"image_id": i, "caption": "ä dog\n\u2028" * i, "score": 0.1 * i, "file": "\udcff.png"} for i in range(7)]
LINES = [seal(record) for record in RECORDS]


def test_a_record_comes_back_as_it_was():
    for record, line in zip(RECORDS, LINES):
        assert unseal(line) == record and line.count(b"\n") == 1 and line.decode()


def test_a_line_that_is_cut_or_changed_anywhere_is_none():
    line = LINES[3]
    for end in range(len(line)):
        assert unseal(line[:end]) is None
    for place in range(len(line)):
        for bit in (1, 0x20):
            changed = bytearray(line)
            changed[place] ^= bit
            assert unseal(bytes(changed)) is None
    assert unseal(json.dumps(RECORDS[3]).encode() + b"\n") is None  # as earlier versions wrote it


def test_a_file_is_resumed_at_every_length(tmp_path):
    path, whole = tmp_path / "part", b"".join(LINES)
    ends = [len(b"".join(LINES[:n])) for n in range(len(LINES) + 1)]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        lines = resume(path)
        assert lines == max(n for n, end in enumerate(ends) if end <= size)
        assert path.read_bytes() == whole[:ends[lines]] and list(read_sealed(path)) == RECORDS[:lines]


@pytest.mark.parametrize("lines, multiple, total, kept", [
    (7, 3, 7, 7), (6, 3, 7, 6), (5, 3, 7, 3), (2, 3, 7, 0), (5, 1, 7, 5), (7, 3, None, 6), (0, 3, 7, 0)])
def test_whole_batches_stay(tmp_path, lines, multiple, total, kept):
    path = tmp_path / "part"
    path.write_bytes(b"".join(LINES[:lines]))
    assert resume(path, multiple, total) == kept == len(list(read_sealed(path)))


def test_a_file_that_is_missing_is_made_and_one_that_cannot_be_is_named(tmp_path):
    assert resume(tmp_path / "part") == 0 and (tmp_path / "part").read_bytes() == b""
    with pytest.raises(InputError, match="nowhere"):
        resume(tmp_path / "nowhere" / "part")


def test_bytes_that_no_run_wrote_are_no_records(tmp_path):
    rng, path = random.Random(0), tmp_path / "part"
    for _ in range(200):
        path.write_bytes(LINES[0] + rng.randbytes(rng.randrange(99)) + b"".join(LINES[1:]))
        resume(path)
        kept = list(read_sealed(path))
        assert kept == RECORDS[:len(kept)] and kept
