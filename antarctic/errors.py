"""Errors that a user causes, and text that is safe to print."""

import errno
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


class SafeStream:
    """A text stream that no write fails on, since no line on a terminal may cost a result.

    Characters that the encoding lacks become escapes. Where the pipe has no reader any more, the
    disk is full or the stream is closed, this and all later output is dropped. Attributes: stream,
    what it writes to, None where Python found no such stream; error, that of the first write that
    failed, or None.
    """

    def __init__(self, stream):
        self.stream, self.error = stream, None
        if stream is None:
            self.error = OSError(errno.EBADF, os.strerror(errno.EBADF))

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            if self.stream:
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self.drop(error)
        return len(text)

    def flush(self):
        try:
            if self.stream:
                self.stream.flush()
        except (OSError, ValueError) as error:
            self.drop(error)

    def drop(self, error):
        self.error = self.error or error
        with suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as devnull:
            # Otherwise Python flushes the same output again at exit, and fails.
            os.dup2(devnull.fileno(), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def print_safely(text, name="stdout"):
    """Prints a line to stdout or stderr, whatever that is, see SafeStream. Returns the stream's
    error, or None. A script's streams are safe anyway (runtime.run); those of a user of the library
    may not be."""
    stream = getattr(sys, name)
    if not isinstance(stream, SafeStream):
        stream = SafeStream(stream)
    print(text, file=stream, flush=True)
    return stream.error


def counted(number, noun):
    """A number with its noun: "1 image", "1,200 images"."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"
