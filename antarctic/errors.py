"""Errors that a user causes, and text that a terminal may get."""

import os
import sys
from contextlib import suppress


class InputError(Exception):
    """What a user gave cannot be used. The message is one sentence that says what was tried and
    what to do."""

    def __init__(self, message):
        super().__init__(escape_control(message))


def escape_control(text):
    """A text of a user's as a terminal may get it: control characters, and marks that turn the
    reading direction, as escapes; the beginning of a very long one."""
    text = str(text)
    if len(text) > 2000:
        text = text[:2000] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_safely(text):
    """Prints a line, whatever standard output is, since no print may cost a result: an encoding
    that lacks a character gets its escape, and a pipe that nobody reads any more, or a full disk,
    nothing from then on. Returns the error that kept it from being printed, else None."""
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or Python would try again as it ends
        return error
    return None
