"""Errors that a user causes, and text that is safe to print."""

import os
import sys
from contextlib import suppress


class InputError(Exception):
    """A user's input cannot be used. The message is one sentence: what was tried, what to do."""

    def __init__(self, message):
        super().__init__(escape_control(message))


def escape_control(text):
    """A user's text, made safe for a terminal.

    Control characters, and marks that change the reading direction, become escapes. A text of more
    than 2,000 characters is cut.
    """
    text = str(text)
    if len(text) > 2000:
        text = text[:2000] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_safely(text):
    """Prints a line whatever standard output is, since no print may cost a result.

    Characters that the encoding lacks become escapes. Where the pipe has no reader any more, or the
    disk is full, this and all later output is dropped. Returns that error, or None.
    """
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as devnull:
            # Otherwise Python flushes the same output again at exit, and fails.
            os.dup2(devnull.fileno(), sys.stdout.fileno())
        return error
    return None


def counted(number, noun, plural=None):
    """A number with its noun: "1 image", "1,200 images". plural: where it is not noun + "s"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
