"""Sealed lines: the results of an unfinished run, each with a checksum that shows whether it is
whole.

A line is 16 hexadecimal digits of the SHA-256 of its text, a space, and the text, one JSON value.
What a kill, a full disk or another program left of a line never counts as a result.
"""

import hashlib
import json
import os

from antarctic.bounded import parse_json
from antarctic.errors import InputError
from antarctic.files import TEXT, own_file, writing

DIGITS = 16
LONGEST_LINE = 1 << 26  # bytes; 1,000 candidates have 0.1 MB


def checksum(text):
    return hashlib.sha256(text).hexdigest()[:DIGITS].encode()


def seal(record):
    """A record as a sealed line, bytes. record: whatever JSON can hold, but not None."""
    # TEXT["errors"] writes a file name's bytes that are no UTF-8 as JSON escapes.
    text = json.dumps(record, ensure_ascii=False).encode(errors=TEXT["errors"])
    return b"%s %s\n" % (checksum(text), text)


def unseal(line):
    """The record of a line, bytes; None where the line is not whole or was changed."""
    digits, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or digits != checksum(text[:-1]):
        return None
    try:
        return parse_json(text.decode(), "", "record")
    except (InputError, ValueError, RecursionError):  # seal() did not write it
        return None


def lines_of(file):
    """Yields the lines of a file that is open as bytes, up to one that is longer than any that a
    run writes: another program's file may be one line of a terabyte."""
    for line in iter(lambda: file.readline(LONGEST_LINE), b""):
        yield line
        if len(line) == LONGEST_LINE:
            return


def resume(path):
    """Cuts a file off behind its leading whole lines, and returns their number. A missing file has
    no lines. Raises InputError where the file cannot be written, or is no file of its own."""
    lines = end = 0
    if not os.path.lexists(path):
        return 0
    with writing(path), open(path, "rb+", opener=own_file) as file:
        for line in lines_of(file):
            if unseal(line) is None:
                break
            lines, end = lines + 1, end + len(line)
        file.truncate(end)
    return lines


def read_sealed(path):
    """Yields the records of a file up to the first line that is not whole."""
    with open(path, "rb") as file:
        for line in lines_of(file):
            if (record := unseal(line)) is None:
                return
            yield record
