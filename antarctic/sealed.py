"""Records of an unfinished run, one sealed line each, so that a later run knows which are whole."""

import hashlib
import json
from pathlib import Path

from antarctic.files import writing

DIGITS = 16  # of the seal


def digest(text):
    """The seal of a JSON text, bytes of hexadecimal digits. text: bytes."""
    return hashlib.sha256(text).hexdigest()[:DIGITS].encode()


def seal(record):
    """A record as one line of bytes: its seal, a space, its JSON in UTF-8, a line break.

    record: whatever JSON can hold, but not None. Half a character (a lone surrogate) is written as
    JSON's own escape of it, since UTF-8 has none.
    """
    text = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return digest(text) + b" " + text + b"\n"


def unseal(line):
    """The record of a line that seal() wrote; None where the line is not whole or was altered."""
    seal_digits, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or seal_digits != digest(text):
        return None
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):  # sealed by another program than this one
        return None


def resume(path, fits):
    """The records that an earlier run left in a part file, a list; empty where there is no file.

    Records count from the start of the file as long as their lines are whole and fits(number of the
    record, record) is true. The file is cut behind them, so appending to it continues the run.
    Raises InputError where the file cannot be written.
    """
    records, size = [], 0
    if not Path(path).exists():
        return records
    with writing(path), open(path, "rb+") as file:
        for line in file:
            record = unseal(line)
            if record is None or not fits(len(records), record):
                break
            records.append(record)
            size += len(line)
        file.truncate(size)
    return records
