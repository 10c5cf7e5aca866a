"""Results that a run keeps as it goes on: a file of lines, each sealed by a checksum that tells
whether it is whole.

A line is 16 hexadecimal digits of the SHA-256 of its text, a space, and the text: one JSON value.
What a kill, a full disk or another program left of a line is never taken for a result.
"""

import hashlib
import json
from pathlib import Path

from antarctic.files import TEXT, writing

DIGITS = 16


def checksum(text):
    return hashlib.sha256(text).hexdigest()[:DIGITS].encode()


def seal(record):
    """A record as a sealed line, bytes. record: whatever JSON can hold, but not None."""
    # TEXT["errors"]: half a character, as a file name of no encoding has it, becomes a JSON escape.
    text = json.dumps(record, ensure_ascii=False).encode(errors=TEXT["errors"])
    return b"%s %s\n" % (checksum(text), text)


def unseal(line):
    """The record of a sealed line, or None where the line is not whole or was changed. line:
    bytes."""
    digits, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or digits != checksum(text[:-1]):
        return None
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):  # sealed by somebody else
        return None


def resume(path, multiple=1, total=None):
    """Cuts a file down to the whole lines that it begins with. Returns how many are left.

    multiple: so many lines belong together, as a batch; only whole batches stay, unless all of
    total lines are there. A file that is missing has none. Raises InputError where it cannot be
    written.
    """
    ends = [0]  # of lines, in bytes
    if not Path(path).exists():
        return 0
    with writing(path), open(path, "rb+") as file:
        for line in file:
            if unseal(line) is None:
                break
            ends.append(ends[-1] + len(line))
        lines = len(ends) - 1
        if lines != total:
            lines -= lines % multiple
        file.truncate(ends[lines])
    return lines


def read_sealed(path):
    """The records of a file, one after the other, as far as they are whole."""
    with open(path, "rb") as file:
        for line in file:
            if (record := unseal(line)) is None:
                return
            yield record
